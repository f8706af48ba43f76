"""The gRPC API: one thin file per service, each handler parses, calls the engine, packs."""
