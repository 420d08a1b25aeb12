import torch

torch.set_num_threads(1)  # two threads beside another process are slower than one
