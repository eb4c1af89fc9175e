def install(worker):
    pass  # placeholder until recording.py stands
