"""Backbones: networks that map inputs to features, without the head."""

from cl.backbones.networks import MLP as MLP
from cl.backbones.networks import AlexNetGPM as AlexNetGPM
from cl.backbones.networks import ResNet18 as ResNet18
from cl.backbones.networks import SimpleCNN as SimpleCNN
from cl.backbones.vit import Timm as Timm
from cl.backbones.vit import ViT as ViT
