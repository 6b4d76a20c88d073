"""Several pretrainings, one after another in the same processes: starting processes costs more than small runs.

accelerate launch ... tests/several_runs.py '[["--model.name=...", ...], [...]]' '[5, 6]'

The second list, which can be left out, names batches whose loss is NaN whenever they come.
"""

import json
import sys

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState

from spark import pretrain
from tests.test_pretrain import bad_batches

if __name__ == "__main__":
    PartialState.destroy_process_group = lambda self, group=None: (
        None
    )  # a run ends with it; the next one needs it
    bad = set(json.loads(sys.argv[2])) if len(sys.argv) > 2 else set()
    for arguments in json.loads(sys.argv[1]):
        AcceleratorState._reset_state(reset_partial_state=True)
        with pytest.MonkeyPatch.context() as patch:
            if bad:
                bad_batches(patch, bad)
            pretrain.main(arguments)
    torch.distributed.destroy_process_group()
