import torch

torch.set_num_threads(1)  # toys are too small to share; two threads beside another process are slower than one
