//! Who may call, and what they may spend.

use super::super::raw::{RawBudget, RawConfig};
use super::super::read::{At, Named};
use super::super::{
    Auth, AuthMode, Backend, BackendKind, Budget, BudgetPeriod, BudgetScope, Place, Route, WhenSpent,
    defaults, problem,
};
use super::Checker;
use crate::economics::NanoUsd;

impl Checker<'_> {
    /// With virtual keys, every API needs a key of its own: a client's is worth nothing there.
    pub(super) fn auth(&mut self, raw: &RawConfig, backends: &[Backend]) -> Auth {
        let written = raw.auth.as_ref().and_then(|auth| auth.value.mode.as_ref());
        let mode = written.map_or(AuthMode::PassThrough, |mode| mode.value);
        if mode == AuthMode::Keys {
            for backend in backends.iter().filter(|backend| is_keyless_api(backend)) {
                let place = raw.backends.as_ref().and_then(|all| place_of_backend(all, &backend.name));
                self.findings.problem(
                    &place.unwrap_or_default(),
                    format!(
                        "backend `{}` has no `api_key`, and with `auth.mode = \"keys\"` clients bring none",
                        backend.name
                    ),
                    "write `api_key = { env = \"OPENAI_API_KEY\" }`",
                );
            }
        }
        if mode == AuthMode::PassThrough {
            self.warn_of_apis_without_credentials(raw, backends);
        }
        Auth { mode }
    }

    /// The client's own key goes to the first API alone: whose it is cannot be told.
    fn warn_of_apis_without_credentials(&mut self, raw: &RawConfig, backends: &[Backend]) {
        let mut apis = backends.iter().filter(|backend| matches!(backend.kind, BackendKind::Api));
        let Some(first) = apis.next() else { return };
        for backend in apis.filter(|backend| is_keyless_api(backend)) {
            let place = raw.backends.as_ref().and_then(|all| place_of_backend(all, &backend.name));
            self.findings.warning(
                &place.unwrap_or_default(),
                format!(
                    "backend `{}` gets no credentials: it has no `api_key`, and the client's own go to `{}` alone",
                    backend.name, first.name
                ),
                "write `api_key`, unless it asks for none",
            );
        }
    }

    pub(super) fn budgets(
        &mut self,
        raw: Option<&Named<RawBudget>>,
        routes: &[Route],
        mode: AuthMode,
    ) -> Vec<Budget> {
        let raw = raw.map_or(&[][..], |named| &named.0);
        if let Some((_, extra)) = raw.get(defaults::MOST_BUDGETS) {
            let what = format!("is one budget more than {}", defaults::MOST_BUDGETS);
            self.findings.problem(&extra.place, what, "give virtual keys budgets of their own");
        }
        raw.iter().filter_map(|(name, at)| self.budget(name, at, routes, mode)).collect()
    }

    fn budget(&mut self, name: &str, at: &At<RawBudget>, routes: &[Route], mode: AuthMode) -> Option<Budget> {
        let raw = &at.value;
        let Some(usd) = &raw.usd else {
            self.findings.missing(&at.place, "usd", "write the most that calls may cost, as `usd = 100`");
            return None;
        };
        if usd.value.0 < NanoUsd::ZERO {
            self.findings.problem(&usd.place, "must not be negative", "write an amount in USD, as `100`");
        }
        let period = raw.period.as_ref().map_or(BudgetPeriod::Month, |at| at.value);
        let when_spent = raw.when_spent.as_ref().map_or(WhenSpent::Refuse, |at| at.value);
        let scope = self.scope(at, routes, mode);
        Some(Budget { name: name.to_owned(), scope, limit: usd.value.0, period, when_spent })
    }

    fn scope(&mut self, at: &At<RawBudget>, routes: &[Route], mode: AuthMode) -> BudgetScope {
        let RawBudget { team, route, key, .. } = &at.value;
        if [team, route, key].into_iter().flatten().count() > 1 {
            let remedy = "keep one of `team`, `route` and `key`, and write another budget for the other";
            self.findings.problem(&at.place, "is for more than one thing", remedy);
        }
        for empty in [team, route, key].into_iter().flatten().filter(|at| at.value.is_empty()) {
            self.findings.problem(
                &empty.place,
                "is empty",
                "write whose calls the budget counts, or remove it",
            );
        }
        if let Some(route) = route {
            self.check_route_name(route, routes);
            return BudgetScope::Route(route.value.clone());
        }
        if let Some(key) = key {
            if mode != AuthMode::Keys {
                let remedy = "write `auth.mode = \"keys\"`, or a budget for a team or a route";
                self.findings.problem(&key.place, "counts nothing: there are no virtual keys", remedy);
            }
            return BudgetScope::Key(key.value.clone());
        }
        team.as_ref().map_or(BudgetScope::All, |team| BudgetScope::Team(team.value.clone()))
    }

    fn check_route_name(&mut self, named: &At<String>, routes: &[Route]) {
        let names = routes.iter().map(|route| route.name.as_str());
        if named.value.is_empty() || names.clone().any(|name| name == named.value) {
            return;
        }
        let remedy = match problem::nearest(&named.value, names) {
            Some(name) => format!("did you mean `{name}`?"),
            None => "write the name of a route".to_owned(),
        };
        self.findings.problem(&named.place, format!("there is no route `{}`", named.value), remedy);
    }
}

fn is_keyless_api(backend: &Backend) -> bool {
    let is_authorization = |(name, _): &(String, _)| {
        ["authorization", "api-key", "x-api-key"].iter().any(|known| name.eq_ignore_ascii_case(known))
    };
    matches!(backend.kind, BackendKind::Api)
        && backend.api_key.is_none()
        && !backend.headers.iter().any(is_authorization)
}

fn place_of_backend<T>(all: &Named<T>, name: &str) -> Option<Place> {
    all.0.iter().find(|(other, _)| other == name).map(|(_, at)| at.place.clone())
}
