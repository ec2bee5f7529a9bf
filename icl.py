"""Few-shot in-context evaluation: ``python icl.py --model_path MODEL``; its flags: ``python icl.py --help``."""

from stanford_alpaca.evaluation.icl import main

if __name__ == "__main__":
    main()
