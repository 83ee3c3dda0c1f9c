"""Board side: bundle -> answers. Light: no torch, no transformers, ever."""
