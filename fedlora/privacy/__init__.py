"""Example-level differential privacy: noise calibrated once for a whole federation, and a ledger of what was spent."""

from fedlora.privacy.calibration import PrivacyPlan, plan_privacy
from fedlora.privacy.ledger import Ledger

__all__ = ["Ledger", "PrivacyPlan", "plan_privacy"]
