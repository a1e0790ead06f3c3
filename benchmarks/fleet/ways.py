"""The rows of the tables."""

from __future__ import annotations

from fleet.device import Way
from hat_runtime.cloud.scheduler import SchedulerConfig
from hat_runtime.control.chunk_policy import BALANCE, PREDICTIVE
from hat_runtime.control.sharing import Courtesy
from hat_runtime.device.chunking import ChunkConfig
from hat_runtime.device.policy import DraftConfig
from hat_runtime.wire.frames import MAX_STEP_TOKENS

WHOLE = ChunkConfig(0)
WHOLE_PASSES = SchedulerConfig(max_batch_tokens=2 * MAX_STEP_TOKENS)
"""A prompt is one pass, whatever that does to others."""
SARATHI_TOKENS = 128
"""U-Sarathi's budget of a pass is not published; its passes are short and even, so it is below the GPU's knee."""
DRAFTS = DraftConfig(alternatives=0)
"""As the product by default, but without alternatives: nobody has published how often they are right."""

U_SHAPE = Way("U-shape", WHOLE, WHOLE_PASSES)
U_SARATHI = Way("U-Sarathi", WHOLE, SchedulerConfig(max_batch_tokens=SARATHI_TOKENS))
FIXED = Way("chunks of 128", ChunkConfig(128))
FIXED_DRAFTS = Way("chunks of 128, drafts", ChunkConfig(128), drafting=DRAFTS)
HAT_BALANCE = Way("HAT, balance", ChunkConfig(policy=BALANCE), drafting=DRAFTS)
HAT = Way("HAT, predictive", ChunkConfig(policy=PREDICTIVE), drafting=DRAFTS)
HAT_COURTEOUS = Way(
    "HAT, predictive, --max-stretch 0.25",
    ChunkConfig(policy=PREDICTIVE),
    SchedulerConfig(courtesy=Courtesy(0.25)),
    DRAFTS,
)
PAPER_WAYS = (U_SHAPE, U_SARATHI, FIXED, FIXED_DRAFTS, HAT_BALANCE, HAT, HAT_COURTEOUS)
FLEET_WAYS = (U_SHAPE, U_SARATHI, FIXED, HAT)
