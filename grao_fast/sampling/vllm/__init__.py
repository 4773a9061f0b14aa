"""Sampling with vLLM (0.22 or later): a server over HTTP, or an engine in this process.

Both draw from softmax(z / temperature) over the whole vocabulary, whatever a model's
generation_config.json says, and give log-probs of that distribution (logprobs_mode
"processed_logprobs"; by vLLM's default, they would be those at temperature 1).

Weights are handed over as a checkpoint in a folder, from which vLLM's workers load them in place
(their method `reload_weights`). That costs one write and one read of the weights a step, in memory
if the folder is in /dev/shm, and needs neither NCCL nor a second GPU. A server that was started
for it gets a LoRA adapter alone, or all weights by vLLM's own weight transfer (`handover`). Before
the first step and after every hand-over, a check proves that the weights arrived
(`grao_fast.sampling.held_weights`). Several processes gather their weights for it layer by layer.

Both classes are tested against vLLM 0.32.0 on CPUs (`pytest -m vllm`), and untested on GPUs. A seed
repeats a sample only as far as vLLM's kernels are deterministic.
"""

from grao_fast.sampling.vllm.engine import VLLMColocatedSampler
from grao_fast.sampling.vllm.server import VLLMServerSampler

__all__ = ["VLLMColocatedSampler", "VLLMServerSampler"]
