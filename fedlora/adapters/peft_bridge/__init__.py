"""Any adapter of PEFT's in a frozen base model, with a client axis.

PEFT makes the adapters; each of its layers is then run as a function of its arrays. So one layer serves all clients of
a cohort, one after the other, and per-example gradients need no formula of their own. Nothing here knows the types by
name: what a type does is measured on small layers of drawn weights (:func:`probe.probe`) before it enters the model.
"""

from fedlora.adapters.peft_bridge.config import alpha_key as alpha_key
from fedlora.adapters.peft_bridge.config import peft_config as peft_config
from fedlora.adapters.peft_bridge.config import peft_types as peft_types
from fedlora.adapters.peft_bridge.config import rank_key as rank_key
from fedlora.adapters.peft_bridge.export import export_adapter as export_adapter
from fedlora.adapters.peft_bridge.layers import ROWS as ROWS
from fedlora.adapters.peft_bridge.model import DRAWN_KIND as DRAWN_KIND
from fedlora.adapters.peft_bridge.model import FINGERPRINT as FINGERPRINT
from fedlora.adapters.peft_bridge.model import TRAINED_KIND as TRAINED_KIND
from fedlora.adapters.peft_bridge.model import PeftAdaptedModel as PeftAdaptedModel
from fedlora.adapters.peft_bridge.model import adapt_peft as adapt_peft
