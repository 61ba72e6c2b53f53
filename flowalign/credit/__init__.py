"""Credit: from rewards and groups to advantages, one kind per file."""

from flowalign.credit.base import Credit, Groups, group_stats
from flowalign.credit.best import Best
from flowalign.credit.energies import Energies
from flowalign.credit.gdpo import GDPO
from flowalign.credit.group import GroupCredit
from flowalign.credit.log_tame import LogTame
from flowalign.credit.rank import Rank

__all__ = ["GDPO", "Best", "Credit", "Energies", "GroupCredit", "Groups", "LogTame", "Rank", "group_stats"]
