{{- /* A JSON patch of a RayCluster: groups of these names, in this order, get the sizes that the settings below count on. */}}
{{- define "manta.sizes" -}}
{{- $patch := list -}}
{{- range $i, $group := .Values.workers -}}
{{- $at := printf "/spec/workerGroupSpecs/%d" $i -}}
{{- $max := $.Values.autoscaling.enabled | ternary $group.maxReplicas $group.minReplicas -}}
{{- $patch = append $patch (dict "op" "test" "path" (printf "%s/groupName" $at) "value" $group.name) -}}
{{- $patch = append $patch (dict "op" "replace" "path" (printf "%s/minReplicas" $at) "value" $group.minReplicas) -}}
{{- $patch = append $patch (dict "op" "replace" "path" (printf "%s/maxReplicas" $at) "value" $max) -}}
{{- end -}}
{{- toJson $patch -}}
{{- end -}}

{{- /* The settings of the service: fields of service/settings.py. */}}
{{- define "manta.settings" -}}
{{- $v := .Values -}}
{{- $nodes := list -}}
{{- range $v.workers -}}
{{- $pods := $v.autoscaling.enabled | ternary .maxReplicas .minReplicas -}}
{{- $resources := merge (dict "CPU" .cpus "GPU" (default 0 .gpus)) (default dict .custom) -}}
{{- $nodes = append $nodes (dict "count" $pods "resources" $resources) -}}
{{- end -}}
MANTA_HOST: 0.0.0.0
MANTA_TOKENS: required
MANTA_FIRST_ADMIN_TOKEN_FILE: /etc/manta/admin_token
{{- if $v.monitoring.serviceMonitor }}
MANTA_METRICS_TOKEN_FILE: /etc/manta/metrics_token
{{- end }}
MANTA_LOG_FORMAT: {{ $v.frontend.logFormat }}
MANTA_ALLOWED_ROOTS: {{ join " " $v.frontend.allowedRoots | quote }}
MANTA_MIRROR_ROOTS: {{ join " " $v.frontend.mirrorRoots | quote }}
# What the groups may grow to: jobs that would not fit then are refused, others wait.
MANTA_CLUSTER_NODES: {{ toJson $nodes | quote }}
MANTA_PREDICTOR_CPUS: {{ $v.serving.cpusPerModel | quote }}
MANTA_STOP_GRACE_S: {{ $v.jobs.checkpointSeconds | quote }}
{{- range $name, $value := $v.frontend.settings }}
MANTA_{{ upper $name }}: {{ $value | toString | quote }}
{{- end }}
{{- end -}}
