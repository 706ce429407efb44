"""python -m configs configs/ft.yaml lr=1e-4: every value of the merged config, and the layer it came from."""
import sys

import configs


def written(value):
    """A value as it would stand in a file."""
    if value is None or isinstance(value, list):
        return "null" if value is None else str(value)
    return configs.dump(value).removesuffix("...\n").strip()


cfg, source, explicit = configs.load_or_exit(sys.argv[1:])
rows = [(key, source.get(key, ""), written(value)) for key, value in configs.flat(cfg).items()]
key_width, layer_width = (max(len(row[i]) for row in rows) for i in (0, 1))
for key, layer, value in rows:
    print(f"{key:<{key_width}}  {layer:<{layer_width}}  {value}")
