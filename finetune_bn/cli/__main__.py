"""`python -m finetune_bn.cli`: the command."""

from finetune_bn.cli import main

if __name__ == "__main__":
    main()
