"""The mathematics of diffusion, in numpy: noise levels, samplers, schedules."""
