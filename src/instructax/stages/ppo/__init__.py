"""Proximal policy optimization from human feedback, PPO and PPO-ptx (paper, section 3.5 and
Eq. 2)."""
