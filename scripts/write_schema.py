"""Write the recipe's JSON Schema, which editors complete and check recipes with.

python scripts/write_schema.py
"""

from pathlib import Path

import accel_trainer
from accel_trainer.recipe_file import schema_text

if __name__ == "__main__":
    path = Path(accel_trainer.__file__).with_name("recipe.schema.json")
    path.write_text(schema_text(), encoding="utf-8")
    print(path)
