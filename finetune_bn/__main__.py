"""`python -m finetune_bn`: the command."""

from finetune_bn.cli import main

if __name__ == "__main__":
    main()
