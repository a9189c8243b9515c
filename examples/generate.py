"""Generate text; the model's experts come from a cache that all such processes share. Run: see the README."""

import sys

import transformers

import shmroute
from shmroute.integrations.transformers import load

checkpoint, name, prompt = sys.argv[1:]
runtime = shmroute.attach(name)
model = load(checkpoint, runtime)  # instead of AutoModelForCausalLM.from_pretrained(checkpoint)

tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
tokens = tokenizer(prompt, return_tensors="pt")
output = model.generate(**tokens, max_new_tokens=40, do_sample=False)
print(tokenizer.decode(output[0]))
print(f"hit rate of all processes so far: {runtime.metrics().hit_rate:.3f}")
