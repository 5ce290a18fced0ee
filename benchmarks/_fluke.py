"""FedAvg and adversarial training by fluke and by Fulgurite, in turn; runs where fluke is installed.

Arguments: a file for the result, repetitions, and rounds of a repetition.
"""

import json
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from statistics import median
from typing import Any

import torch
from _federated import MILLION, SMALL, Classifier, Optimizers, QUIET, Rounds, digits, mlp, quieten
from fluke import DDict, FlukeENV
from fluke.algorithms.fat import FAT
from fluke.algorithms.fedavg import FedAVG
from fluke.data import DummyDataContainer, DataSplitter, FastDataLoader
from fluke.utils import FederationObserver
from lightning.pytorch import Trainer, seed_everything
from torch.nn import CrossEntropyLoss
from torch.optim import SGD
from torch.utils.data import DataLoader, TensorDataset

from fulgurite.plugins.federated import PGD
from fulgurite.plugins.federated.partition import iid_partition
from fulgurite.strategies import FederatedAdversarialStrategy, FederatedStrategy
