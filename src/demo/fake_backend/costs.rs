//! The list of an organisation's costs, which has a key of its own.

use serde_json::{Value, json};

use super::answer::Answer;
use super::errors::{self, Failure};
use super::{Personality, SeenRequest};

pub(super) const PATH: &str = "/v1/organization/costs";

/// What each day has cost.
#[derive(Debug, Clone, PartialEq)]
pub struct Costs {
    /// The only key that may read it.
    pub key: String,
    /// Amounts by page: a number or a text, and its currency.
    pub pages: Vec<Vec<(Value, &'static str)>>,
}

impl Costs {
    pub(super) fn answer(&self, personality: Personality, seen: &SeenRequest) -> Result<Answer, Failure> {
        let given = seen.header("authorization").strip_prefix("Bearer ");
        if given != Some(&self.key) {
            return Err(errors::unauthorized(personality, given));
        }
        let page = asked(seen, "page").and_then(|page| page.parse().ok()).unwrap_or(0_usize);
        let amounts = self.pages.get(page).map_or(&[][..], Vec::as_slice);
        let result = |(value, currency): &(Value, &str)| {
            json!({"object": "organization.costs.result", "amount": {"value": value, "currency": currency},
                "line_item": null, "project_id": null})
        };
        let results: Vec<Value> = amounts.iter().map(result).collect();
        let second = |name| asked(seen, name).and_then(|second| second.parse::<u64>().ok());
        let bucket = json!({"object": "bucket", "start_time": second("start_time"),
            "end_time": second("end_time"), "results": results});
        let next = (page + 1 < self.pages.len()).then(|| (page + 1).to_string());
        Ok(Answer::json(
            &json!({"object": "page", "data": [bucket], "has_more": next.is_some(), "next_page": next}),
        ))
    }
}

fn asked<'a>(seen: &'a SeenRequest, name: &str) -> Option<&'a str> {
    let pairs = seen.uri.query().unwrap_or_default().split('&');
    pairs.filter_map(|pair| pair.split_once('=')).find(|(key, _)| *key == name).map(|(_, value)| value)
}
