"""Fine-tune BERT-family encoders for text classification."""

import os

# Before torch is imported: threads that spin while they wait make every other job on the machine, and this one, many times
# slower (measured: three trainings on two cores, 49 s against 9 s). It changes no result.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
