"""`python -m trainer.doctor [CONFIG] [key=value …] [--json]`: a machine looked over before a launch, a line a subject.

report      what a finding is, and how checks are run: each has a time limit, none can end the doctor, none is left out silently
machine     without a configuration: versions, GPUs, memory, limits, native kernels, collectives
launch      with one: model folder, data, judge, engine servers, run folder, disk, the planner's fit
collective  ranks that time an all-reduce; gpus: what torch sees of the GPUs. Both in processes of their own
"""
