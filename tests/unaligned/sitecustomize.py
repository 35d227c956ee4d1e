"""Python imports this at the start of every process of ``pytest --weight-offset N``, before anything else."""

import unaligned_weights

unaligned_weights.start()
