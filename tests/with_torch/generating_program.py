"""``generating_program.py FOLDER NAME PROMPT``: a worker that generates greedily and prints the token ids as JSON."""

from __future__ import annotations

import json
import sys

import torch

import shmroute
from shmroute.integrations.transformers import load

folder, name, prompt = sys.argv[1:]
with shmroute.attach(name) as runtime:
    model = load(folder, runtime, timeout=60)
    output = model.generate(torch.tensor([json.loads(prompt)]), max_new_tokens=32, do_sample=False)
    print(json.dumps(output[0].tolist()))
    del model
