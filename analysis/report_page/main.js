// The records of this page are those of ablations.json and probes.json, their numbers rounded.

const report = JSON.parse(byId("data").textContent);
drawHead(report);
drawOverview(report);
window.viewer = new Viewer(report);
drawMore(report);
