"""What `finetune-bn --help` prints; no parser, and so no torch and no Lightning, is needed for it."""

from __future__ import annotations

VERBS = {
    "fit": "Train, and keep the best checkpoint, the config and a report.",
    "validate": "Evaluate a checkpoint on the validation images.",
    "test": "Evaluate a checkpoint on the test images, domain by domain.",
    "predict": "Write classes and scores, or embeddings, of the test images (or of any: see below) to a CSV file.",
    "plan": "Show what would happen to each BatchNorm layer of the model, and why. Trains nothing.",
    "diagnose": "Say what model, data and batches mean for the BatchNorm layers, and advise. Trains nothing.",
    "compare": "Try treatments of the BatchNorm layers by short trainings, and write the best as a config.",
    "recalibrate": "Give a checkpoint the BatchNorm statistics of the data, and write it to a new file.",
    "export": "Write the network of a checkpoint to a file that needs neither its code nor this package.",
    "configs": "List the configs that come with the package.",
    "init": "Write a config that fits a folder of images.",
}
_HELP = """usage: finetune-bn COMMAND --config NAME_OR_FILE [--config ...] [options]

Fine-tune backbones with their BatchNorm layers in hand.

commands:
{verbs}

To begin with:
  finetune-bn plan --config quickstart                       look first: what happens to each layer
  finetune-bn diagnose --config quickstart                   what your data and batches mean for it, and advice
  finetune-bn fit --config quickstart                        train on images that come with the package
  finetune-bn init my_images.yaml --data path/to/images      a config for your own; then fit --config my_images.yaml

To use what a run has left beside its report, without config and data module:
  finetune-bn predict --model runs/.../report/model.safetensors image.jpg folder/ [--output out.csv] [--top 3]

`finetune-bn COMMAND --help` has the options of a command. Any value of a config can be changed behind it, such as
--model.lr 1e-4, or by a second --config. --version prints the version."""


def help_text() -> str:
    """Return the help of the whole command."""
    width = max(map(len, VERBS))
    return _HELP.format(verbs="\n".join(f"  {verb:{width}}  {words}" for verb, words in VERBS.items()))
