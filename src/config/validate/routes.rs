//! The routes: which models there are, who may serve them, and by which rule.

use std::collections::{BTreeSet, HashMap};
use std::path::PathBuf;

use super::super::raw::{PolicyName, RawBackend, RawBand, RawOffer, RawRoute, RawThreshold};
use super::super::read::{At, Named};
use super::super::{
    Backend, BackendId, BackendKind, Band, ByName, Features, Offer, Place, PriceBook, Route, RouteId,
    RoutePolicy, Threshold, defaults, dialect, problem,
};
use super::Checker;

impl Checker<'_> {
    pub(super) fn routes(
        &mut self,
        raw: Option<&Named<RawRoute>>,
        raw_backends: Option<&Named<RawBackend>>,
        backends: &[Backend],
        prices: &PriceBook,
    ) -> (Vec<Route>, ByName<RouteId>) {
        let raw = raw.map_or(&[][..], |named| &named.0);
        if let Some((_, extra)) = raw.get(defaults::MOST_ROUTES) {
            let what = format!("is one route more than {}", defaults::MOST_ROUTES);
            self.findings.problem(&extra.place, what, "give one route several `models`");
        }
        let known = &raw[..raw.len().min(defaults::MOST_ROUTES)];
        let routes: Vec<Route> =
            known.iter().map(|(name, at)| self.route(name, at, backends, prices)).collect();
        self.report_unused(known, raw_backends, backends);
        let models = self.models(known);
        (routes, models)
    }

    fn route(&mut self, name: &str, at: &At<RawRoute>, backends: &[Backend], prices: &PriceBook) -> Route {
        let raw = &at.value;
        let models: Vec<String> = raw
            .models
            .as_ref()
            .map_or_else(Vec::new, |at| at.value.iter().map(|m| m.value.clone()).collect());
        if models.is_empty() {
            let remedy = "write the names that clients ask for, as `models = [\"gpt-4o-mini\"]`";
            self.findings.missing(&at.place, "models", remedy);
        }
        let written = raw.offers.as_ref().map_or(&[][..], |at| &at.value);
        if written.is_empty() {
            let remedy = "write who may serve it, as `offers = [{ backend = \"openai\" }]`";
            self.findings.missing(&at.place, "offers", remedy);
        }
        let mut offers: Vec<Offer> = Vec::new();
        for offer in written {
            let Some(checked) = self.offer(offer, backends) else { continue };
            if offers.iter().any(|earlier| earlier.backend == checked.backend) {
                let what =
                    format!("backend `{}` is offered twice", backends[usize::from(checked.backend.0)].name);
                self.findings.problem(&offer.place, what, "keep one offer of each backend");
                continue;
            }
            self.warn_if_unpriced(&checked, offer, &models, backends, prices);
            offers.push(checked);
        }
        let all_offers_are_known = offers.len() == written.len();
        let policy = self.route_policy(at, &offers, backends, all_offers_are_known);
        Route { name: name.to_owned(), models, policy, offers }
    }

    fn offer(&mut self, at: &At<RawOffer>, backends: &[Backend]) -> Option<Offer> {
        let raw = &at.value;
        let Some(named) = &raw.backend else {
            self.findings.missing(&at.place, "backend", "write the name of a backend");
            return None;
        };
        let Some(index) = backends.iter().position(|backend| backend.name == named.value) else {
            let names = backends.iter().map(|backend| backend.name.as_str());
            let remedy = match problem::nearest(&named.value, names.clone()) {
                Some(name) => format!("did you mean `{name}`?"),
                None => format!("write one of: {}", names.collect::<Vec<_>>().join(", ")),
            };
            self.findings.problem(&named.place, format!("there is no backend `{}`", named.value), remedy);
            return None;
        };
        let backend = &backends[index];
        let price = match (&backend.kind, &raw.price) {
            (BackendKind::SelfHosted(_), Some(price)) => {
                let remedy = "remove it: a self-hosted backend costs `hourly_usd` and `request_usd`";
                self.findings.problem(&price.place, "belongs to offers of API backends", remedy);
                None
            }
            (_, price) => price.as_ref().and_then(|at| self.price_card(&at.value, &at.place)),
        };
        if let Some(model) = raw.model.as_ref().filter(|model| model.value.is_empty()) {
            self.findings.problem(&model.place, "is empty", "write the model's name at this backend");
        }
        if let Some(window) = raw.context_window.as_ref().filter(|window| window.value.0 == 0) {
            self.findings.problem(&window.place, "must be at least 1", "write the longest context in tokens");
        }
        let tokenizer = raw.tokenizer.as_ref().and_then(|at| self.tokenizer(at, backend));
        let id = u16::try_from(index).expect("there are at most 256 backends");
        Some(Offer {
            backend: BackendId(id),
            model: raw.model.as_ref().map(|model| model.value.clone()),
            price,
            context_window: raw.context_window.as_ref().map(|window| window.value.0),
            tokenizer,
            features: features(raw, backend),
        })
    }

    /// Found now, read when it is first needed: a large one takes half a second.
    fn tokenizer(&mut self, at: &At<String>, backend: &Backend) -> Option<PathBuf> {
        if matches!(backend.kind, BackendKind::Api) {
            let remedy = "remove it: an API's models are counted with the vocabularies of OpenAI";
            self.findings.problem(&at.place, "belongs to offers of self-hosted backends", remedy);
            return None;
        }
        let path = self.surroundings.folder.join(&at.value);
        if !path.is_file() {
            let what = format!("there is no file `{}`", path.display());
            self.findings.problem(&at.place, what, "write the path of the model's `tokenizer.json`");
            return None;
        }
        Some(path)
    }

    /// A price that nobody knows makes every comparison on this route a guess.
    fn warn_if_unpriced(
        &mut self,
        offer: &Offer,
        raw: &At<RawOffer>,
        models: &[String],
        backends: &[Backend],
        prices: &PriceBook,
    ) {
        let is_api = matches!(backends[usize::from(offer.backend.0)].kind, BackendKind::Api);
        if !is_api || offer.price.is_some() {
            return;
        }
        let names = offer.model.as_ref().map_or(models, std::slice::from_ref);
        for name in names.iter().filter(|name| prices.card(name).is_none()) {
            self.findings.warning(
                &raw.place,
                format!("no price is known for `{name}`"),
                format!("write `[prices.models.{name:?}]`, or `price = {{ input = .., output = .. }}` here"),
            );
        }
    }

    /// The rule of a route. Without one it is the only kind of offer there is, or `cheapest` of the two.
    fn route_policy(
        &mut self,
        at: &At<RawRoute>,
        offers: &[Offer],
        backends: &[Backend],
        all_offers_are_known: bool,
    ) -> RoutePolicy {
        let raw = &at.value;
        let kind_of = |offer: &Offer| &backends[usize::from(offer.backend.0)].kind;
        let has_api = offers.iter().any(|offer| matches!(kind_of(offer), BackendKind::Api));
        let has_own = offers.iter().any(|offer| matches!(kind_of(offer), BackendKind::SelfHosted(_)));
        let threshold = raw.threshold.as_ref().map(|at| self.threshold(at));
        let Some(policy) = &raw.policy else {
            return match (has_api, has_own) {
                (true, false) => RoutePolicy::Api,
                (false, true) => RoutePolicy::SelfHosted,
                _ => RoutePolicy::Cheapest,
            };
        };
        let (needs_api, needs_own) = match policy.value {
            PolicyName::Api => (true, false),
            PolicyName::SelfHosted => (false, true),
            _ => (true, true),
        };
        for (needed, there, kind) in
            [(needs_api, has_api, "an `api`"), (needs_own, has_own, "a `self_hosted`")]
        {
            if needed && !there && all_offers_are_known && !offers.is_empty() {
                self.findings.problem(
                    &policy.place,
                    format!("this policy needs an offer of {kind} backend"),
                    "add such an offer, or leave the policy out",
                );
            }
        }
        match policy.value {
            PolicyName::Cheapest => RoutePolicy::Cheapest,
            PolicyName::Adaptive => RoutePolicy::Adaptive,
            PolicyName::Api => RoutePolicy::Api,
            PolicyName::SelfHosted => RoutePolicy::SelfHosted,
            PolicyName::Threshold => self.threshold_policy(threshold, &policy.place),
            PolicyName::Split => self.split_policy(raw, &policy.place),
        }
    }

    fn threshold_policy(&mut self, threshold: Option<Threshold>, place: &Place) -> RoutePolicy {
        const REMEDY: &str = "write `threshold = { requests_per_day = { up = 250000, down = 200000 } }`; \
                              `breakeven plan` says where break-even is";
        if threshold.is_none() {
            self.findings.problem(place, "there is no `threshold` to go by", REMEDY);
        }
        RoutePolicy::Threshold(threshold.unwrap_or_default())
    }

    fn split_policy(&mut self, raw: &RawRoute, place: &Place) -> RoutePolicy {
        const REMEDY: &str = "write the share of calls for the self-hosted backend, as 0.3";
        if raw.self_hosted_share.is_none() {
            self.findings.problem(place, "there is no `self_hosted_share` to split by", REMEDY);
        }
        let share = self.share(raw.self_hosted_share.as_ref(), 0.0, 0.0..=1.0, REMEDY);
        RoutePolicy::Split { self_hosted_share: share }
    }

    fn threshold(&mut self, at: &At<RawThreshold>) -> Threshold {
        let raw = &at.value;
        if raw.requests_per_day.is_none() && raw.tokens_per_day.is_none() && raw.usd_per_day.is_none() {
            self.findings.problem(
                &at.place,
                "has no numbers",
                "write `requests_per_day`, `tokens_per_day` or `usd_per_day`",
            );
        }
        Threshold {
            requests_per_day: raw.requests_per_day.as_ref().and_then(|band| self.threshold_band(band)),
            tokens_per_day: raw.tokens_per_day.as_ref().and_then(|band| self.threshold_band(band)),
            usd_per_day: raw.usd_per_day.as_ref().and_then(|band| self.threshold_band(band)),
        }
    }

    fn threshold_band(&mut self, at: &At<RawBand>) -> Option<Band> {
        let (up, down) = match &at.value {
            RawBand::One(number) => (number.0, number.0 * defaults::BAND_DOWN_SHARE),
            RawBand::Band(table) => self.band(table, &at.place)?,
        };
        if up <= 0.0 || down < 0.0 {
            self.findings.problem(&at.place, "must be above zero", "write a volume a day, as 250000");
        } else if down > up {
            self.findings.problem(
                &at.place,
                format!("the band is upside down: `down` ({down}) is above `up` ({up})"),
                "write the larger number as `up`",
            );
        }
        Some(Band { up, down })
    }

    fn models(&mut self, routes: &[(String, At<RawRoute>)]) -> ByName<RouteId> {
        let mut models = ByName::default();
        let mut first_named: HashMap<String, Place> = HashMap::new();
        for (index, (_, route)) in routes.iter().enumerate() {
            let id = RouteId(u16::try_from(index).expect("there are at most 4096 routes"));
            for model in route.value.models.as_ref().map_or(&[][..], |at| &at.value) {
                if model.value.is_empty() {
                    self.findings.problem(&model.place, "is empty", "write the name that clients ask for");
                } else if let Some(first) = first_named.get(&model.value) {
                    let line = first.line.map(|line| format!(" in line {line}")).unwrap_or_default();
                    let what =
                        format!("model `{}` is on a route already{line} ({})", model.value, first.path);
                    self.findings.problem(&model.place, what, "keep it on one route");
                } else {
                    first_named.insert(model.value.clone(), model.place.clone());
                    models.insert(model.value.clone(), id);
                }
            }
        }
        models
    }

    /// A backend that no route offers does nothing, except the first API: it serves what is on no route.
    fn report_unused(
        &mut self,
        routes: &[(String, At<RawRoute>)],
        raw: Option<&Named<RawBackend>>,
        backends: &[Backend],
    ) {
        let offered: BTreeSet<&str> = routes
            .iter()
            .filter_map(|(_, route)| route.value.offers.as_ref())
            .flat_map(|offers| &offers.value)
            .filter_map(|offer| offer.value.backend.as_ref())
            .map(|backend| backend.value.as_str())
            .collect();
        let default = backends.iter().position(|backend| matches!(backend.kind, BackendKind::Api));
        let tables = raw.map_or(&[][..], |named| &named.0);
        let names: Vec<&str> = backends.iter().map(|backend| backend.name.as_str()).collect();
        // An offer that misspells a backend means to use it.
        let meant = |name: &str| {
            offered.iter().any(|offered| {
                !names.contains(offered) && problem::nearest(offered, names.iter().copied()) == Some(name)
            })
        };
        for (index, (name, at)) in tables.iter().enumerate().take(backends.len()) {
            if !offered.contains(name.as_str()) && !meant(name) && default != Some(index) {
                self.findings.problem(
                    &at.place,
                    "nobody uses this backend",
                    format!("add `{{ backend = {name:?} }}` to the offers of a route, or remove the backend"),
                );
            }
        }
    }
}

fn features(raw: &RawOffer, backend: &Backend) -> Features {
    let default = match &backend.kind {
        BackendKind::Api => dialect::api_features(),
        BackendKind::SelfHosted(own) => own.server.features(),
    };
    let or = |written: &Option<At<bool>>, default| written.as_ref().map_or(default, |at| at.value);
    Features {
        tools: or(&raw.tools, default.tools),
        json_schema: or(&raw.json_schema, default.json_schema),
        vision: or(&raw.vision, default.vision),
        audio: or(&raw.audio, default.audio),
        logprobs: or(&raw.logprobs, default.logprobs),
        multiple_choices: or(&raw.multiple_choices, default.multiple_choices),
        embeddings: or(&raw.embeddings, default.embeddings),
        responses: or(&raw.responses, default.responses),
    }
}
