"""Plan a training run or a served model on paper: memory, time and reliability, before you rent any machine."""
