//! Who calls, as far as the request's tags say it.

use http::{HeaderMap, HeaderValue};

use super::exchange::Caller;
use super::headers;

/// Tags are cut to this length in the ledger.
const MAX_TAGS_BYTES: usize = 256;

fn split(tags: Option<&HeaderValue>) -> impl Iterator<Item = (&str, &str)> {
    let tags = tags.and_then(|tags| tags.to_str().ok()).unwrap_or_default();
    tags.split(',').filter_map(|tag| tag.split_once('=')).map(|(name, value)| (name.trim(), value.trim()))
}

/// The team that the header of tags names.
pub fn team_of(tags: Option<&HeaderValue>) -> String {
    split(tags).find(|(name, _)| *name == "team").map_or_else(String::new, |(_, team)| team.to_owned())
}

pub fn caller_of(headers: &HeaderMap) -> Caller {
    let Some(tags) = headers.get(headers::TAGS) else { return Caller::default() };
    let mut others = String::new();
    for (name, value) in split(Some(tags)).filter(|(name, _)| *name != "team") {
        let separator = if others.is_empty() { "" } else { "," };
        if others.len() + separator.len() + name.len() + 1 + value.len() > MAX_TAGS_BYTES {
            break;
        }
        others.extend([separator, name, "=", value]);
    }
    Caller { key: String::new(), team: team_of(Some(tags)), tags: others }
}
