"""The monitor of a running model: attach, step, close.

A number's way: a probe's hook writes it into a slot (``probe_set`` arms and reads the probes), processes join their numbers
(``rank_gather``), the step waits until its numbers are on the host (``step_queue``), the detector judges it, and a thread hands it
to the sinks (``sink_thread``); a run folder brings its own sinks (``run_output``).
"""
