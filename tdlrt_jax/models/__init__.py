"""The paper's networks for ``flax.nnx``; each takes its conv layer as an argument."""

from tdlrt_jax.models.alexnet import AlexNet
from tdlrt_jax.models.lenet5 import LeNet5
from tdlrt_jax.models.resnet18 import ResNet18
from tdlrt_jax.models.vgg16 import VGG16

__all__ = ["VGG16", "AlexNet", "LeNet5", "ResNet18"]
