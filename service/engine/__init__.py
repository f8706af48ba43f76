"""Batching and execution on the one model thread of a replica. Knows neither protobuf, gRPC nor Ray.

`engine.Engine` is the entry point; `work` holds what goes in and comes out, `settings` the budgets, `errors` what
fails. Imports stay in the modules: settings and work can be imported without torch.
"""
