import logging

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells of an optional kernel when peft imports it
