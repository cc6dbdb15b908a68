"""Distance field to textured, watertight mesh: extract, simplify, unwrap, bake, write.

`build` joins the steps; `writers` stores the result.  Heavy packages are imported when first needed.
"""
