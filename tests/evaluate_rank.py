"""One rank of utils.evaluate on the test rows of a folder; every rank prints what it was told."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

import utils
from dataset import eval_loader, prepare_data
from model import load_backbone

backbone, news = map(Path, sys.argv[1:])
data = prepare_data(str(news), backbone, 128, None, None)
dist.init_process_group("gloo")
torch.manual_seed(0)
model = load_backbone(backbone)
cpu = torch.device("cpu")
loader = eval_loader(data.test, 4, dist.get_rank(), dist.get_world_size())
loss, accuracy = utils.evaluate(model, loader, cpu, utils.autocast(cpu, "fp32"), len(data.test))
print(json.dumps({"loss": loss, "accuracy": accuracy}))
dist.destroy_process_group()
