"""What a run measures its pictures by: rewards by name, how they are called, and what becomes of missing scores."""

from flowalign.scoring.coming import Coming
from flowalign.scoring.measure import Measure
from flowalign.scoring.missing import Missing
from flowalign.scoring.ramp import Ramp
from flowalign.scoring.scorer import Scorer
from flowalign.scoring.seen import Latents, Seen
from flowalign.scoring.turns import Scores, Turns

__all__ = ["Coming", "Latents", "Measure", "Missing", "Ramp", "Scorer", "Scores", "Seen", "Turns"]
