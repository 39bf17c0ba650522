"""timm backbones with the weights asked for."""

from finetune_bn.backbones.create import PACKAGES, create_backbone, data_config

__all__ = ["PACKAGES", "create_backbone", "data_config"]
