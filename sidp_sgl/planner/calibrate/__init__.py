"""Room: calibration. Measures a machine for the planner; imports SGLang within functions only."""
