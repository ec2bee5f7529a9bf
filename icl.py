"""Few-shot in-context evaluation: ``python icl.py --model_path MODEL``; see ``--help``."""

from stanford_alpaca.evaluation.icl import main

if __name__ == "__main__":
    main()
