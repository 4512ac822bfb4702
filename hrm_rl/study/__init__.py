"""The study of Q-learning for halting without target networks and replay (`python -m hrm_rl.ablate`)."""
