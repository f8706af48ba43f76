"""Where Serve config files that were written before `register.py` find `add_services`."""

from service.rpc.register import add_services as add_services
