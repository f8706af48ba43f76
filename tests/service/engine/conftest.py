import torch

# The models here are tiny: a second thread costs more than it gains, and far more on a busy machine.
torch.set_num_threads(1)
