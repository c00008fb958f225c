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
{{- $cpus := 0 -}}{{- $gpus := 0 -}}{{- $custom := dict -}}
{{- range $v.workers -}}
{{- $pods := $v.autoscaling.enabled | ternary (int .maxReplicas) (int .minReplicas) -}}
{{- $cpus = add $cpus (mul $pods .cpus) -}}
{{- $gpus = add $gpus (mul $pods (default 0 .gpus)) -}}
{{- range $name, $amount := .custom -}}
{{- $_ := set $custom $name (add (default 0 (get $custom $name)) (mul $pods $amount)) -}}
{{- end -}}
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
# What the groups may grow to: jobs for more are refused, others wait.
MANTA_CLUSTER_CPUS: {{ $cpus | quote }}
MANTA_CLUSTER_GPUS: {{ $gpus | quote }}
MANTA_CLUSTER_CUSTOM: {{ toJson $custom | quote }}
MANTA_PREDICTOR_CPUS: {{ $v.serving.cpusPerModel | quote }}
MANTA_STOP_GRACE_S: {{ $v.jobs.checkpointSeconds | quote }}
{{- range $name, $value := $v.frontend.settings }}
MANTA_{{ upper $name }}: {{ $value | toString | quote }}
{{- end }}
{{- end -}}
