//! Reads a parsed TOML document into tables of `raw`, collecting problems instead of stopping at the first.
//!
//! serde stops at the first error, and an owner who mends a file wants to see all of them. So the tables are
//! declared once with [`tables!`], which makes of each the struct, its JSON Schema and a reader that reports
//! every unknown key and every value of a wrong type, and goes on.

use std::borrow::Cow;

use schemars::{JsonSchema, Schema, SchemaGenerator};
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::problem::{Findings, Place, nearest};

/// A value that can be read from TOML. `None`: it could not, and the findings say why.
pub(super) trait FromToml: Sized {
    fn read(value: &DeValue<'_>, place: &Place, findings: &mut Findings) -> Option<Self>;
}

/// A value together with its place in the file, for problems that are found later.
#[derive(Debug, Clone)]
pub(super) struct At<T> {
    pub(super) value: T,
    pub(super) place: Place,
}

impl<T: FromToml> FromToml for At<T> {
    fn read(value: &DeValue<'_>, place: &Place, findings: &mut Findings) -> Option<Self> {
        T::read(value, place, findings).map(|value| Self { value, place: place.clone() })
    }
}

impl<T: FromToml> FromToml for Box<T> {
    fn read(value: &DeValue<'_>, place: &Place, findings: &mut Findings) -> Option<Self> {
        T::read(value, place, findings).map(Self::new)
    }
}

impl<T: JsonSchema> JsonSchema for At<T> {
    fn inline_schema() -> bool {
        T::inline_schema()
    }

    fn schema_name() -> Cow<'static, str> {
        T::schema_name()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        T::json_schema(generator)
    }
}

/// A table whose keys are the owner's own names, in the order of the file.
#[derive(Debug, Clone)]
pub(super) struct Named<T>(pub(super) Vec<(String, At<T>)>);

impl<T> Default for Named<T> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<T: FromToml> FromToml for Named<T> {
    fn read(value: &DeValue<'_>, place: &Place, findings: &mut Findings) -> Option<Self> {
        let table = as_table(value, place, findings)?;
        // The parser keeps keys sorted by name; the owner's order is that of their positions.
        let mut entries: Vec<_> = table.iter().collect();
        entries.sort_by_key(|(key, _)| key.span().start);
        let read = entries.into_iter().filter_map(|(key, value)| {
            let place = place_of(key, place, findings);
            let value = At::read(value.get_ref(), &place, findings)?;
            Some((key.get_ref().to_string(), value))
        });
        Some(Self(read.collect()))
    }
}

impl<T: JsonSchema> JsonSchema for Named<T> {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        format!("Named_{}", T::schema_name()).into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let inner = generator.subschema_for::<T>();
        schemars::json_schema!({ "type": "object", "additionalProperties": inner })
    }
}

impl<T: FromToml> FromToml for Vec<T> {
    fn read(value: &DeValue<'_>, place: &Place, findings: &mut Findings) -> Option<Self> {
        let Some(array) = value.as_array() else {
            wrong_type("an array", value, place, findings);
            return None;
        };
        let read = array.iter().enumerate().filter_map(|(index, element)| {
            let mut place = place.element(index);
            place.line = Some(findings.line_of(element.span().start));
            T::read(element.get_ref(), &place, findings)
        });
        Some(read.collect())
    }
}

/// A table that is being read: it has reported its unknown keys already.
pub(super) struct TableReader<'table, 'text> {
    table: &'table DeTable<'text>,
    place: Place,
}

impl<'table, 'text> TableReader<'table, 'text> {
    pub(super) fn open(
        value: &'table DeValue<'text>,
        place: &Place,
        known: &[&str],
        findings: &mut Findings,
    ) -> Option<Self> {
        let table = as_table(value, place, findings)?;
        for key in table.keys().filter(|key| !known.contains(&key.get_ref().as_ref())) {
            unknown_key(key, place, known, findings);
        }
        Some(Self { table, place: place.clone() })
    }

    pub(super) fn key<T: FromToml>(&self, name: &str, findings: &mut Findings) -> Option<T> {
        let (key, value) = self.table.iter().find(|(key, _)| *key.get_ref() == name)?;
        let place = place_of(key, &self.place, findings);
        T::read(value.get_ref(), &place, findings)
    }
}

fn place_of(key: &Spanned<Cow<'_, str>>, parent: &Place, findings: &Findings) -> Place {
    Place { line: Some(findings.line_of(key.span().start)), ..parent.child(key.get_ref()) }
}

fn unknown_key(key: &Spanned<Cow<'_, str>>, parent: &Place, known: &[&str], findings: &mut Findings) {
    let place = place_of(key, parent, findings);
    let remedy = match nearest(key.get_ref(), known.iter().copied()) {
        Some(word) => format!("did you mean `{word}`?"),
        None => format!("remove it, or use one of: {}", known.join(", ")),
    };
    findings.problem(&place, "unknown key", remedy);
}

fn as_table<'table, 'text>(
    value: &'table DeValue<'text>,
    place: &Place,
    findings: &mut Findings,
) -> Option<&'table DeTable<'text>> {
    if value.as_table().is_none() {
        wrong_type("a table", value, place, findings);
    }
    value.as_table()
}

/// Reports a value of a wrong type, without the value: it might be a secret in the wrong place.
pub(super) fn wrong_type(expected: &str, value: &DeValue<'_>, place: &Place, findings: &mut Findings) {
    let found = match value {
        DeValue::String(_) => "a string",
        DeValue::Integer(_) | DeValue::Float(_) => "a number",
        DeValue::Boolean(_) => "true or false",
        DeValue::Datetime(_) => "a date",
        DeValue::Array(_) => "an array",
        DeValue::Table(_) => "a table",
    };
    findings.problem(place, format!("is {found}"), format!("write {expected}"));
}

/// Declares tables of the configuration. Every key is optional here; what must be there is for `validate`
/// to say. The first line of a key's comment is its description in the JSON Schema.
macro_rules! tables {
    ($( $(#[$about:meta])* $table:ident { $( $(#[$doc:meta])* $key:ident: $type:ty, )* } )*) => { $(
        $(#[$about])*
        #[derive(Debug, Default, Clone, schemars::JsonSchema)]
        #[schemars(deny_unknown_fields)]
        pub(super) struct $table {
            $( $(#[$doc])* pub(super) $key: Option<$type>, )*
        }

        impl $crate::config::read::FromToml for $table {
            fn read(
                value: &toml::de::DeValue<'_>,
                place: &$crate::config::problem::Place,
                findings: &mut $crate::config::problem::Findings,
            ) -> Option<Self> {
                const KEYS: &[&str] = &[$( stringify!($key) ),*];
                let table = $crate::config::read::TableReader::open(value, place, KEYS, findings)?;
                Some(Self { $( $key: table.key(stringify!($key), findings), )* })
            }
        }
    )* };
}
pub(super) use tables;

/// Declares how the variants of a closed set are written.
macro_rules! words {
    ($( $type:ty { $( $word:literal => $variant:expr, )* } )*) => { $(
        impl $crate::config::read::FromToml for $type {
            fn read(
                value: &toml::de::DeValue<'_>,
                place: &$crate::config::problem::Place,
                findings: &mut $crate::config::problem::Findings,
            ) -> Option<Self> {
                const WORDS: &[(&str, $type)] = &[$( ($word, $variant) ),*];
                $crate::config::read::one_of(value, WORDS, place, findings)
            }
        }

        impl schemars::JsonSchema for $type {
            fn inline_schema() -> bool {
                true
            }

            fn schema_name() -> std::borrow::Cow<'static, str> {
                stringify!($type).into()
            }

            fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
                schemars::json_schema!({ "enum": [$( $word ),*] })
            }
        }
    )* };
}
pub(super) use words;

pub(super) fn one_of<T: Copy>(
    value: &DeValue<'_>,
    words: &[(&str, T)],
    place: &Place,
    findings: &mut Findings,
) -> Option<T> {
    let listed = words.iter().map(|(word, _)| format!("\"{word}\"")).collect::<Vec<_>>().join(", ");
    let Some(written) = value.as_str() else {
        wrong_type(&format!("one of {listed}"), value, place, findings);
        return None;
    };
    let found = words.iter().find(|(word, _)| *word == written).map(|(_, variant)| *variant);
    if found.is_none() {
        let remedy = match nearest(written, words.iter().map(|(word, _)| *word)) {
            Some(word) => format!("did you mean \"{word}\"?"),
            None => format!("write one of {listed}"),
        };
        findings.problem(place, "is not a word that is known here", remedy);
    }
    found
}
