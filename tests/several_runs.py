"""Several pretrainings, one after another in the same processes: starting processes costs more than small runs.

accelerate launch ... tests/several_runs.py '[["--model.name=...", ...], [...]]'
"""

import json
import sys

import torch
from accelerate.state import AcceleratorState, PartialState

from spark import pretrain

if __name__ == "__main__":
    PartialState.destroy_process_group = lambda self, group=None: (
        None
    )  # a run ends with it; the next one needs it
    for arguments in json.loads(sys.argv[1]):
        AcceleratorState._reset_state(reset_partial_state=True)
        pretrain.main(arguments)
    torch.distributed.destroy_process_group()
