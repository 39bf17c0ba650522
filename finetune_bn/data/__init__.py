"""Data modules for Lightning: the embedded emoji, any image folder, any torchvision classification set."""

from finetune_bn.data.base import ImageDataModule
from finetune_bn.data.emoji import EmojiData
from finetune_bn.data.image_folder import ImageFolderData
from finetune_bn.data.images import Batch, ImageSet
from finetune_bn.data.torchvision_data import TorchvisionData

__all__ = ["EmojiData", "ImageFolderData", "TorchvisionData", "ImageDataModule", "ImageSet", "Batch"]
