"""The small world behind the shipped instructions and the tiny base model's pre-training text.

Everything here was written for this project. A *fact* is a pair or a membership that the
pre-training text states in many ways. The instructions ask for some facts in training and for
others in the held-out set. So a model has to know the facts from pre-training and learn from the
instructions how to answer. The running text uses the words of a synonym pair interchangeably.
Therefore their rows of the output embedding are close, and the transport cost between them is
small.
"""

SYNONYMS = [
    pair.split("/")
    for pair in """
big/large small/little fast/quick happy/glad sad/unhappy angry/mad smart/clever quiet/silent
loud/noisy rich/wealthy brave/bold calm/peaceful strange/odd pretty/beautiful ugly/hideous
tired/weary sick/ill strong/powerful weak/feeble easy/simple hard/difficult old/ancient new/modern
correct/right wrong/false kind/gentle mean/cruel funny/amusing boring/dull tasty/delicious
awful/terrible great/wonderful tiny/minute huge/enormous thin/slim fat/plump wet/damp clean/spotless
dirty/filthy cold/chilly hot/scorching bright/shiny dark/gloomy rare/uncommon usual/normal
safe/secure risky/dangerous famous/renowned lazy/idle busy/occupied honest/truthful rude/impolite
polite/courteous scared/afraid shy/timid proud/arrogant wise/sensible silly/foolish full/packed
vacant/empty begin/start end/finish buy/purchase help/assist answer/reply choose/select fix/repair
hide/conceal jump/leap keep/retain look/gaze need/require shout/yell speak/talk weep/cry
build/construct gather/collect road/street house/home boat/ship child/kid doctor/physician
friend/pal gift/present job/task picture/image stone/rock story/tale woods/forest
""".split()
]

ANTONYMS = [
    pair.split("/")
    for pair in """
hot/cold big/small fast/slow happy/sad rich/poor strong/weak easy/hard old/young clean/dirty
bright/dark full/empty wet/dry thick/thin tall/short wide/narrow deep/shallow heavy/light
sharp/blunt early/late near/far high/low loud/quiet open/closed sweet/sour rough/smooth
brave/cowardly cheap/expensive safe/dangerous true/false right/wrong kind/cruel polite/rude
lazy/hardworking awake/asleep alive/dead sick/healthy common/rare public/private strict/lenient
front/back top/bottom inside/outside day/night summer/winter north/south east/west begin/end
win/lose buy/sell push/pull give/take love/hate laugh/cry rise/fall arrive/leave remember/forget
accept/refuse increase/decrease attack/defend build/destroy float/sink freeze/melt import/export
war/peace victory/defeat friend/enemy question/answer success/failure beginning/ending
""".split()
]

CAPITALS = [
    pair.split("/")
    for pair in """
France/Paris Spain/Madrid Italy/Rome Germany/Berlin Poland/Warsaw Austria/Vienna Hungary/Budapest
Greece/Athens Portugal/Lisbon Norway/Oslo Sweden/Stockholm Finland/Helsinki Denmark/Copenhagen
Ireland/Dublin England/London Belgium/Brussels Russia/Moscow Ukraine/Kyiv Romania/Bucharest
Bulgaria/Sofia Serbia/Belgrade Croatia/Zagreb Turkey/Ankara Egypt/Cairo Kenya/Nairobi Ghana/Accra
Senegal/Dakar Morocco/Rabat Tunisia/Tunis Ethiopia/Addis Uganda/Kampala Japan/Tokyo China/Beijing
India/Delhi Thailand/Bangkok Vietnam/Hanoi Nepal/Kathmandu Iran/Tehran Iraq/Baghdad Canada/Ottawa
Cuba/Havana Peru/Lima Chile/Santiago Colombia/Bogota Ecuador/Quito Uruguay/Montevideo Bolivia/Sucre
Australia/Canberra Mongolia/Ulaanbaatar Jordan/Amman Lebanon/Beirut Syria/Damascus Qatar/Doha
Oman/Muscat Cyprus/Nicosia
""".split()
]

CATEGORIES = {  # category: (plural, members)
    "bird": (
        "birds",
        "robin eagle owl sparrow parrot crow swan heron falcon pigeon penguin stork raven finch",
    ),
    "fish": ("fish", "salmon trout tuna carp cod herring pike shark eel perch"),
    "animal": (
        "animals",
        (
            "dog cat horse cow sheep goat pig fox wolf bear lion tiger rabbit deer mouse elephant "
            "monkey camel"
        ),
    ),
    "insect": ("insects", "ant bee fly wasp moth beetle cricket mosquito"),
    "fruit": (
        "fruits",
        "apple pear plum peach cherry banana lemon grape mango melon fig apricot lime",
    ),
    "vegetable": (
        "vegetables",
        "carrot potato onion cabbage spinach radish turnip leek pumpkin celery",
    ),
    "tool": ("tools", "hammer saw drill wrench chisel shovel rake axe spade file plane"),
    "vehicle": ("vehicles", "car bus train truck tram bicycle motorcycle van tractor taxi"),
    "garment": ("garments", "shirt coat hat scarf skirt sock glove jacket belt sweater dress"),
    "instrument": (
        "instruments",
        "piano violin flute trumpet drum guitar harp cello clarinet organ",
    ),
    "flower": ("flowers", "rose tulip daisy lily violet orchid poppy iris"),
    "tree": ("trees", "oak pine birch willow maple cedar elm beech"),
    "drink": ("drinks", "water milk tea coffee juice wine beer lemonade"),
    "metal": ("metals", "iron gold silver copper tin lead zinc nickel"),
    "sport": ("sports", "football tennis golf hockey rugby boxing rowing chess"),
    "colour": ("colours", "red blue green yellow black white brown purple pink grey"),
    "furniture": ("furniture", "table chair sofa desk bed shelf stool cupboard bench"),
}
NO_ARTICLE = {"drink", "metal", "sport", "colour"}  # "water is a drink", but "a robin is a bird"

SIZES = [  # by body size, smallest first
    "ant",
    "bee",
    "mouse",
    "sparrow",
    "rabbit",
    "cat",
    "fox",
    "dog",
    "goat",
    "sheep",
    "wolf",
    "pig",
    "lion",
    "bear",
    "cow",
    "horse",
    "camel",
    "elephant",
]

WORKERS = [
    line.split(":")
    for line in """
baker:bakes bread
farmer:grows wheat
teacher:teaches pupils
doctor:treats patients
pilot:flies planes
sailor:sails ships
painter:paints pictures
singer:sings songs
writer:writes books
tailor:sews clothes
carpenter:makes tables
butcher:cuts meat
fisherman:catches fish
gardener:plants flowers
mechanic:repairs engines
builder:builds walls
barber:cuts hair
judge:decides trials
soldier:guards borders
nurse:nurses the sick
dentist:cleans teeth
miner:digs coal
waiter:serves meals
cook:prepares soup
librarian:lends novels
postman:delivers letters
cleaner:sweeps floors
shepherd:watches sheep
potter:shapes clay
jeweller:polishes rings
dancer:performs dances
driver:drives buses
hunter:hunts deer
lawyer:explains laws
scientist:tests theories
smith:forges swords
weaver:weaves carpets
clerk:stamps papers
banker:lends money
detective:solves crimes
""".strip().splitlines()
]

VERBS = [
    v.split("/")
    for v in """
washes/washed cleans/cleaned opens/opened closes/closed paints/painted moves/moved carries/carried
watches/watched finds/found sees/saw takes/took brings/brought breaks/broke buys/bought sells/sold
holds/held loses/lost makes/made throws/threw catches/caught hides/hid steals/stole forgets/forgot
draws/drew wants/wanted likes/liked follows/followed touches/touched repairs/repaired uses/used
lifts/lifted drops/dropped pulls/pulled pushes/pushed counts/counted
""".split()
]

PEOPLE = (
    "Anna Ben Clara David Emma Felix Grace Henry Ivy Jack Kate Leo Mary Nick Olga Peter Rosa Sam "
    "Tina Victor"
).split()
PLACES = (
    "kitchen garden market school church library park station office museum cellar garage stable "
    "theatre harbour"
).split()
ROLES = [worker for worker, _ in WORKERS]
THINGS = (
    "box lamp cup plate ring key book basket bottle clock mirror rope ladder carpet bucket knife "
    "spoon bag coin map"
).split()

PRAISE = (
    "wonderful great beautiful pretty amusing funny delicious tasty brilliant charming lovely "
    "superb"
).split()
BLAME = (
    "awful terrible boring dull ugly hideous filthy dirty horrible dreadful disappointing poor"
).split()
REVIEWED = (
    "film book meal hotel song play dinner concert novel soup room garden speech game".split()
)

ADJECTIVE_PAIRS = SYNONYMS[: SYNONYMS.index(["begin", "start"])]  # the adjectives come first
CATEGORY_OF = {
    member: category for category, (_, members) in CATEGORIES.items() for member in members.split()
}
MEMBERS = {category: members.split() for category, (_, members) in CATEGORIES.items()}
PLURAL = {category: plural for category, (plural, _) in CATEGORIES.items()}
SYNONYM_OF = {a: b for pair in SYNONYMS for a, b in (pair, pair[::-1])}
PAST = dict(VERBS)


def article(word: str) -> str:
    """Returns ``a`` or ``an`` for a word of this world."""
    return "an" if word[0].lower() in "aeiou" and not word.startswith(("uni", "use")) else "a"


def a(word: str) -> str:
    """Returns the word with its article: ``a robin``, ``an owl``."""
    return f"{article(word)} {word}"


def capital(text: str) -> str:
    """Returns the text with its first letter in upper case."""
    return text[0].upper() + text[1:]


def is_a(member: str) -> str:
    """Returns a sentence such as ``a robin is a bird`` or ``water is a drink``."""
    category = CATEGORY_OF[member]
    subject = member if category in NO_ARTICLE else a(member)
    return f"{subject} is {'a piece of furniture' if category == 'furniture' else a(category)}"
