"""SparK under torch's FSDP2 (`fully_shard`) on two gloo processes: the steps of the whole model, weights sharded.

The training scripts do not use it yet; Accelerate takes FSDP on accelerators only, so this goes to torch itself.
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = """
import copy, torch, torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from spark.masking import visible_at
from spark.model import SparK

dist.init_process_group("gloo")
torch.manual_seed(0)
model = SparK("test_convnext", 64, decoder_width=32)
whole = copy.deepcopy(model)
model.to(memory_format=torch.contiguous_format)  # FSDP2 refuses weights in channels_last memory
fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
assert all(isinstance(p, DTensor) for p in model.parameters())
images, visible = torch.randn(4, 3, 64, 64), visible_at(range(4), model.grid, 0.6, 0)
losses = []
for each in (model, whole):
    optimizer = torch.optim.SGD(each.parameters(), lr=0.1)
    for _ in range(3):
        loss = each(images, visible, int(visible.sum())).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
torch.testing.assert_close(torch.tensor(losses[:3]), torch.tensor(losses[3:]), rtol=1e-6, atol=0)
assert losses[2] < losses[0]
state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
if dist.get_rank() == 0:
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=1e-5, atol=1e-6, msg=name)
    print("equal")
dist.destroy_process_group()
"""


def test_sharded_steps_are_those_of_the_whole_model(tmp_path):
    (tmp_path / "sharded.py").write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launcher, str(tmp_path / "sharded.py")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "equal" in done.stdout
