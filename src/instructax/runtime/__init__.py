"""One process on one machine: distributed start-up, preemption, watchdog, workdir lock,
files, logs and goodput."""
