"""The engine's only room that imports SGLang: every hook, and what SiDP does there."""
