//! The JSON Schema of the configuration, for editors.

use schemars::generate::SchemaSettings;
use serde_json::Value;

use super::raw::RawConfig;

/// JSON Schema (draft 2020-12) of `breakeven.toml`.
pub fn schema() -> Value {
    let schema = SchemaSettings::draft2020_12().into_generator().into_root_schema_for::<RawConfig>();
    let mut schema = schema.to_value();
    drop_nulls(&mut schema);
    schema["title"] = "breakeven.toml".into();
    schema
}

/// A key that may be left out is not one that may be null: TOML has no null.
fn drop_nulls(value: &mut Value) {
    match value {
        Value::Array(values) => values.iter_mut().for_each(drop_nulls),
        Value::Object(object) => {
            object.values_mut().for_each(drop_nulls);
            if let Some(Value::Array(types)) = object.get_mut("type") {
                types.retain(|kind| kind != "null");
                if let [only] = types.as_mut_slice() {
                    let only = only.take();
                    object.insert("type".to_owned(), only);
                }
            }
            if let Some(Value::Array(words)) = object.get_mut("enum") {
                words.retain(|word| !word.is_null());
            }
            if let Some(Value::Array(choices)) = object.get_mut("anyOf") {
                choices.retain(|choice| choice.get("type") != Some(&"null".into()));
                if let [only] = choices.as_mut_slice() {
                    let only = only.take();
                    object.remove("anyOf");
                    if let Value::Object(only) = only {
                        object.extend(only);
                    }
                }
            }
        }
        _ => {}
    }
}
