"""timm backbones with the weights asked for."""

from finetune_bn.backbones.create import PACKAGES, Backbone, create_backbone, data_config

__all__ = ["PACKAGES", "Backbone", "create_backbone", "data_config"]
